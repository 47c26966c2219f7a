// Package v20170312 stands for a module that the Go module proxy doesn't serve, so that flannel can be built: it has the names that
// flannel's backend for one cloud mentions. Nothing here uses that backend; who does is told.
package v20170312

import "errors"

var errAbsent = errors.New("this flannel was built without the backend tencent-vpc")

type (
	Client struct{}

	Filter struct {
		Name   *string
		Values []*string
	}
	Route struct {
		RouteId              *uint64
		DestinationCidrBlock *string
		GatewayType          *string
		GatewayId            *string
		RouteType            *string
		Enabled              *bool
	}
	RouteTable struct {
		RouteTableId *string
		RouteSet     []*Route
	}

	DescribeRouteTablesRequest        struct{ Filters []*Filter }
	DescribeRouteTablesResponseParams struct{ RouteTableSet []*RouteTable }
	DescribeRouteTablesResponse       struct{ Response *DescribeRouteTablesResponseParams }

	CreateRoutesRequest struct {
		RouteTableId *string
		Routes       []*Route
	}
	DeleteRoutesRequest  CreateRoutesRequest
	CreateRoutesResponse struct{}
	DeleteRoutesResponse struct{}
)

func NewClientWithSecretId(_, _, _ string) (*Client, error) { return nil, errAbsent }

func NewDescribeRouteTablesRequest() *DescribeRouteTablesRequest { return &DescribeRouteTablesRequest{} }
func NewCreateRoutesRequest() *CreateRoutesRequest               { return &CreateRoutesRequest{} }
func NewDeleteRoutesRequest() *DeleteRoutesRequest               { return &DeleteRoutesRequest{} }

func (*Client) DescribeRouteTables(*DescribeRouteTablesRequest) (*DescribeRouteTablesResponse, error) {
	return nil, errAbsent
}

func (*Client) CreateRoutes(*CreateRoutesRequest) (*CreateRoutesResponse, error) {
	return nil, errAbsent
}

func (*Client) DeleteRoutes(*DeleteRoutesRequest) (*DeleteRoutesResponse, error) {
	return nil, errAbsent
}
